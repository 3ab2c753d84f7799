"""The ops, one family per file; each op is one declaration."""
