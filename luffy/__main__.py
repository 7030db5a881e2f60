"""`python -m luffy` is the `luffy` command."""

import sys

from luffy.cli import main

sys.exit(main())
