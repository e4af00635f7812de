"""headrace: write once to Postgres, keep every view in step."""
