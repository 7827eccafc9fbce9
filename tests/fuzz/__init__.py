"""Damaged files of every kind: `material` writes whole ones, `damage` damages them, `cases` opens them in forked processes."""
