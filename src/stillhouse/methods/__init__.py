"""The methods: one file per published system, by family. Families do not know each other."""
