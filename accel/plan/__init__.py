"""The plan: schema, symbolic sizes, weight recipes, memory planning, lowering."""
