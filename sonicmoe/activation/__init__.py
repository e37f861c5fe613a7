"""What stands between the two projections, forward and backward."""
