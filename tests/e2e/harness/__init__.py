"""What the end-to-end tests share: the programs under test and around it, callers, certificates."""
