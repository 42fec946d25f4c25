"""The statistics of a study: the papers' claims, tables of runs, and the page that reports them."""
