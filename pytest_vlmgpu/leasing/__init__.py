"""Which GPUs a run has: leased for the whole machine, waited for, divided among workers."""
