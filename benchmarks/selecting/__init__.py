"""The experiment behind the table of selectors, budgets and block maps."""
