"""What people see: tables, figures, published numbers, model cards, from metrics alone. Imports
measure and what lies below; not prompts."""
