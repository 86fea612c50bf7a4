"""What goes in: rows of the sources, sampled into prompt sets. Imports measure and what lies below;
not reporting."""
