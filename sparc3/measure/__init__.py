"""What is measured on a model, and how sure we are of it. Imports circuits, relevance, model and
base."""
