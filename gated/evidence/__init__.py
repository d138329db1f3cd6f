"""Evidence: experiments, campaigns that run them, and the ledger of claims."""
