"""Results, tables, plots and the report of runs."""
