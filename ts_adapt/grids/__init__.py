"""Time grids: N+1 decreasing times, fixed (`fixed`), published (`published`), or made from logits (`parametric`)."""
