"""The modules of the families that several share, or that outgrow a family's file."""
