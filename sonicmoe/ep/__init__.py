"""Expert parallelism: the experts of a layer spread over ranks. docs/ep.md tells how it works.

``paddle_layer.ExpertParallelMoE`` and ``torch_layer.ExpertParallelMoE`` are whole layers; ``paddle_tape`` and
``torch_tape`` have dispatch and combine alone. Loads no framework: a process imports the half that is for its own.

``communicator`` says what a process group must do, ``paddle_communicator`` and ``torch_communicator`` do it;
``layout`` decides which rows go where, ``transport`` moves them, ``call`` is one dispatch with its combine, ``terms``
what ranks must have alike in one.
"""
