"""Graph-to-graph rewrites and the one list that orders them."""
