"""`python -m depthscope` is the command `depthscope`."""

import sys

from depthscope.app.cli.parser import main

sys.exit(main())
