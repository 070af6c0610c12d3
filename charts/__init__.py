"""From result files to numbers, tables and drawings."""
