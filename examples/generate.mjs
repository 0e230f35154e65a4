// A rewritten LLaVA with onnxruntime-node, as the unmodified one is run. The processor is transformers.js's.
//
//     npm install onnxruntime-node @huggingface/transformers
//     node examples/generate.mjs MODEL_DIR "What is this?" photo.jpg [--tokens 64]
//
// Prints the ids of the answer, then the answer.

import { AutoProcessor, RawImage, env } from "@huggingface/transformers";
import * as ort from "onnxruntime-node";
import { parseArgs } from "node:util";

const { values, positionals } = parseArgs({ allowPositionals: true, options: { tokens: { type: "string", default: "64" } } });
const [folder, question, picture] = positionals;
env.allowRemoteModels = false;
const open = (name) => ort.InferenceSession.create(`${folder}/onnx/${name}.onnx`);
const [vision, embed, decoder] = await Promise.all(["vision_encoder", "embed_tokens", "decoder_model_merged"].map(open));
const processor = await AutoProcessor.from_pretrained(folder);
const [imageToken, eos] = processor.tokenizer.convert_tokens_to_ids(["<image>", "</s>"]).map(BigInt);

const content = [...(picture ? [{ type: "image" }] : []), { type: "text", text: question }];
const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
const inputs = picture ? await processor(await RawImage.read(picture), prompt) : processor.tokenizer(prompt);
const int64 = (list) => new ort.Tensor("int64", BigInt64Array.from(list), [1, list.length]);
let ids = [...inputs.input_ids.data];
const caches = decoder.inputMetadata.filter(({ name }) => name.startsWith("past_key_values"));
let past = caches.map(({ name, shape }) => [name, new ort.Tensor("float32", [], [1, shape[1], 0, shape[3]])]);
const answer = [];
for (let seen = 0; answer.length < Number(values.tokens) && answer.at(-1) != eos; seen += ids.length, ids = answer.slice(-1)) {
  const { inputs_embeds } = await embed.run({ input_ids: int64(ids) });
  if (picture && seen == 0) {
    const pixels = new ort.Tensor("float32", inputs.pixel_values.data, inputs.pixel_values.dims);
    const { image_features } = await vision.run({ pixel_values: pixels });
    const first = ids.indexOf(imageToken); // one image: its features lie together
    inputs_embeds.data.set(image_features.data, first * image_features.dims[2]);
  }
  const position_ids = int64(ids.map((_, i) => BigInt(seen + i)));
  const attention_mask = int64(Array(seen + ids.length).fill(1n));
  const { logits, ...present } = await decoder.run({ inputs_embeds, attention_mask, position_ids, ...Object.fromEntries(past) });
  past = Object.entries(present).map(([name, cache]) => [name.replace("present", "past_key_values"), cache]);
  const last = logits.data.subarray(-logits.dims[2]);
  answer.push(BigInt(last.indexOf(Math.max(...last))));
}
console.log(JSON.stringify(answer.map(Number)));
console.log(processor.tokenizer.decode(answer, { skip_special_tokens: true }));
