"""An adapter into its base, tensor by tensor, checked against the adapter on its base.

merging     the merge from end to end
tensors     the merged tensors, each computed when it is read
stored      safetensors read one tensor at a time, and written in shards
agreement   how far the merge is from the model that was trained
rows        the rows that this is measured on
beside      the files beside the weights: config, generation config, tokenizer
place       written beside its place, renamed when it is whole
"""
