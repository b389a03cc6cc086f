"""A world in the plane with an exact teacher: any recipe trains there in about a minute, and shows what it learns."""
