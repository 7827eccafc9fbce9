"""Print a command of the README: the fenced block behind the comment `<!-- command: NAME -->`."""

import pathlib
import re
import sys

name = sys.argv[1]
text = pathlib.Path("README.md").read_text()
found = re.search(rf"<!-- command: {re.escape(name)} -->\s*```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
if found is None:
    sys.exit(f"README.md has no block behind <!-- command: {name} -->")
sys.stdout.write(found.group(1))
