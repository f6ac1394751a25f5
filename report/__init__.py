"""What people read of a run: progress, tables, figures, and the page of options."""
