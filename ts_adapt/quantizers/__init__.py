"""Quantizers: a network with fewer bits, which can be taken off again exactly.

    quantize(network, method, calls)    restore(network)    save(network, folder)    load(network, folder)

    affine.py       codes, scales, zeros; fake quantization, straight-through and LSQ gradients; groups of weights
    packing.py      codes of b bits in bytes and back
    ranges.py       min-max, percentile and MSE ranges
    traversal.py    which layers are quantized, which are not, and why
    parts.py        where a weight is kept (AffineWeight, ...) and what is done to an input (StaticActivation, ...)
    layer.py        QuantizedLayer = operation + weight part + activation part; layers split by input channels
    clock.py        the timestep that the network is being told, for time-dependent parts
    network.py      Quantizer (a method), Quantization (what it does to a network), quantize, restore, sizes
    calls.py        a calibration set: calls of the network
    calibration.py  calibration sets along the sampling trajectory; the inputs of the layers by time
    gram.py         X^T X of a layer's inputs, for methods that look at the error of its output
    storage.py      save and load: safetensors and JSON
    report.py       bits, weight errors, activation ranges and errors of every layer: JSON, CSV, Markdown, a picture
    registry.py     the methods by name

    minmax.py       min-max at any bits, weights and activations; AdaRound (adaround.py) as an option
    hqq.py          half-quadratic quantization: weights at 4, 3, 2 bits without calibration
    torchao.py      int8 Linear layers by torchao's integer kernels
    tdq.py          activation scales predicted from the timestep (time_scale.py), learned weights; frozen to tables
    tinydm.py       channel balancing and folding (balancing.py), time-grouped activations (grouped.py), quantized
                    attention (attention.py)
    vqdm.py         weights as sums of codebook vectors, chosen for the error of the output (codebooks.py)
    training.py     quantization-aware training, and fine-tuning to a teacher

A method is a `Quantizer`: its `apply(to, calls)` puts a `QuantizedLayer` in the place of each of `to.layers()` through
`to.replace`. What a method keeps or does anew is a `Part`, so that saving, sizes and reports know it. Quantization is
simulated (levels of b bits, real arithmetic) unless a method says that integers are computed with.
"""
