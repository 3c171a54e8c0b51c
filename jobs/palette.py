"""Colours of runs, in MLflow's charts and in ours."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""Okabe and Ito's, told apart by colour-blind readers."""
