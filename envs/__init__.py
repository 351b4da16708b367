"""What is learned: Gymnasium environments as tasks. Imports `crl.core` only."""
