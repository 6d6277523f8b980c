"""Small executions of published algorithms: their ranks live in one process and really exchange.

Each function computes with torch what the paper's ranks compute, block by block, and counts what
they send; checks hold the results against an ordinary dense computation.
"""
