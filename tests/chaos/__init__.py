"""What kills, fills up, cuts off and stalls, made on purpose."""
