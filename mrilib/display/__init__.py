"""Figures, tables and JupyterLab browsers. The only package that imports matplotlib or ipywidgets."""
