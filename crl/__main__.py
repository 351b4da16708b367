"""`python -m crl` is `crl`."""

from crl.cli import main

raise SystemExit(main())
