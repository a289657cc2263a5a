"""`qjax plan`: what a quantized model needs and can do on a machine that is not here.

The model's decode step and prefill are compiled by the machine's own compiler, from
shapes alone, in a process of its own (`worker`). What is counted (`counting`) comes
from the jaxpr, what the compiler made of it (`traffic`) from its final program.
"""
