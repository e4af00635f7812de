"""Any captured tables of any database, typed, in DuckDB."""
