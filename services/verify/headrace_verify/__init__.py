"""Verify: compare a view with Postgres at one LSN."""
