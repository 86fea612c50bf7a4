"""Find the neurons behind a behaviour of a language model, prune them, and prove what that did."""
