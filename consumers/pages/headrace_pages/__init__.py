"""The shop's product and category pages, rendered into Redis."""
