"""What learns: agents behind one small contract. Imports `crl.core` only."""
