"""ts-cores doctor: what is wrong here, why it matters, and the line to change."""
