"""``python -m tigon`` is the ``tigon`` command."""

from tigon.cli import main

raise SystemExit(main())
