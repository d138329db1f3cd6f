"""Files and folders -> the files in them: links once, nothing left out in silence."""

import collections
import logging
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gated.data.faults import Fault, Report, describe, shown

log = logging.getLogger(__name__)

MOST = 10  # Suffixes that a message lists.


class File(NamedTuple):
  name: str  # Path relative to the parent of the input.
  path: str
  is_named: bool  # Given itself, not found in a folder.


class Listing:
  """The files of an input, and the count of those that were passed over, by suffix.

  First the files of all folders, sorted, then those behind links, once each.
  """

  def __init__(self, paths: Sequence[str], endings: Sequence[str], report: Report):
    self._endings = tuple(ending.lower() for ending in endings)
    self._report = report
    self._seen: set[tuple[int, int]] = set()  # Device and inode.
    # The link and the parent of its input.
    self._links: collections.deque[tuple[str, str]] = collections.deque()
    self.passed: collections.Counter[str] = collections.Counter()
    self.files = [file for path in paths for file in self._input(path)]
    while self._links:
      self.files += self._follow(*self._links.popleft())

  def skip(self, path: str) -> None:
    """Counts a file that is passed over."""
    name = os.path.basename(path).lower()
    self.passed[os.path.splitext(name)[1] or 'without a suffix'] += 1

  def passed_over(self) -> str:
    """-> the counts of the files that were passed over, in words, or ''."""
    common = self.passed.most_common(MOST)
    rest = sum(self.passed.values()) - sum(count for _, count in common)
    common += [('others', rest)] if rest else []
    return ', '.join(f'{count:,} {shown(suffix)}' for suffix, count in common)

  def _input(self, path: str) -> Iterator[File]:
    # '.' is the folder by its name.
    parent, base = os.path.split(os.path.abspath(path))
    if os.path.isfile(path):
      yield File(base, path, True)
    elif os.path.isdir(path):
      self._is_first(path)
      yield from self._walk(path, parent, is_linked=False)
    else:
      raise ValueError(f'{path!r}: no such file or folder')

  def _follow(self, link: str, parent: str) -> Iterator[File]:
    if not os.path.exists(link):
      self.passed['links to nothing'] += 1
      log.warning('%s: a link to nothing is passed over', shown(link))
    elif not self._is_first(link):
      self.passed['links to what is read already'] += 1
    elif os.path.isdir(link):
      yield from self._walk(link, parent, is_linked=True)
    else:
      yield File(os.path.relpath(link, parent), link, False)

  def _walk(self, folder: str, parent: str, *, is_linked: bool) -> Iterator[File]:
    """A folder -> its regular files with the right endings; collects its links."""
    for place, folders, names in os.walk(folder, onerror=self._unlisted):
      folders.sort()
      for name in [*folders]:
        path = os.path.join(place, name)
        if os.path.islink(path):
          self._links.append((path, parent))
        elif not self._is_first(path) and is_linked:
          folders.remove(name)
      for name in sorted(names):
        path = os.path.join(place, name)
        if not name.lower().endswith(self._endings):
          self.skip(path)
        elif os.path.islink(path):
          self._links.append((path, parent))
        elif not os.path.isfile(path):
          self.passed['no regular files'] += 1
        elif self._is_first(path) or not is_linked:
          yield File(os.path.relpath(path, parent), path, False)

  def _is_first(self, path: str) -> bool:
    """Whether a file or folder is met for the first time."""
    status = os.stat(path)
    key = status.st_dev, status.st_ino
    is_first = key not in self._seen
    self._seen.add(key)
    return is_first

  def _unlisted(self, error: OSError) -> None:
    text = f'{error.filename}: the folder cannot be listed: {describe(error)}'
    self._report(Fault('unreadable', text))
