"""Fused losses inside other people's trainers, one module per framework; each imports its framework when it is used."""
