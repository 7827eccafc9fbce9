"""What people touch: the command line, the dashboard, figures, tables, papers and reports."""
