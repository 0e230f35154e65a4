// Plain ONNX Runtime in JavaScript: three sessions and a loop of one's own. onnxruntime-node in Node.js,
// onnxruntime-web in a browser; the tokenizer and the pictures' pixels are transformers.js's.

import { AutoProcessor, RawImage, env } from "@huggingface/transformers";

const MODULES = ["vision_encoder", "embed_tokens", "decoder_model_merged"];
let ort;

export const version = async () => {
  const { versions } = ort.env;
  const [kind, number] = Object.entries(versions).find(([name]) => name != "common");
  return `onnxruntime-${kind} ${number}`;
};

export async function run(job, models) {
  ort = typeof process == "undefined" ? await import("onnxruntime-web") : await import("onnxruntime-node");
  ort = ort.default ?? ort;
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: models, useBrowserCache: false });
  const processor = await AutoProcessor.from_pretrained(job.model);
  const sessions = {};
  for (const module of MODULES) {
    // A browser has no folder to look for data in.
    const data = job.external.includes(module) && typeof process == "undefined";
    const file = `${models}${job.model}/onnx/${module}.onnx`;
    const externalData = data ? [{ path: `${module}.onnx_data`, data: `${file}_data` }] : undefined;
    sessions[module] = await ort.InferenceSession.create(file, { externalData });
  }
  const loop = new Loop(sessions, processor, job);
  const answers = {};
  for (const one of job.cases) {
    answers[one.name] = one.batch ? await loop.batch(one.rows) : await loop.conversation(one.turns);
  }
  return answers;
}

class Loop {
  constructor(sessions, processor, job) {
    Object.assign(this, { sessions, processor, limit: job.tokens });
    const { tokenizer } = processor;
    [this.image, this.eos] = ["<image>", "</s>"].map((t) => tokenizer.convert_tokens_to_ids([t])[0]);
    this.pad = tokenizer.pad_token_id;
    this.caches = sessions.decoder_model_merged.inputMetadata.filter((i) => i.name.startsWith("past_key_values"));
  }

  /// Ids of a prompt with as many placeholders as there are features, and the features as rows.
  async prompt({ images, prompt }, before) {
    const text = `USER: ${"<image>\n".repeat(images.length)}${prompt} ASSISTANT:`;
    const encode = (text, add_special_tokens) =>
      this.processor.tokenizer(text, { add_special_tokens }).input_ids.tolist()[0].map(Number);
    let ids = before ? [...before, ...encode(" " + text, false)] : encode(text, true);
    if (images.length == 0) return { ids, rows: [] };
    const { pixel_values } = await this.processor.image_processor(await Promise.all(images.map((i) => RawImage.read(i))));
    const pixels = new ort.Tensor("float32", pixel_values.data, pixel_values.dims);
    const { image_features } = await this.sessions.vision_encoder.run({ pixel_values: pixels });
    const [, count, width] = image_features.dims;
    ids = ids.flatMap((id) => (id == this.image ? Array(count).fill(id) : [id]));
    const rows = [];
    for (let at = 0; at < image_features.size; at += width) rows.push(image_features.data.slice(at, at + width));
    return { ids, rows };
  }

  /// Greedy answers to rows of ids, on a cache or none.
  async generate(prompts, cache) {
    const batch = prompts.length;
    const long = Math.max(...prompts.map((p) => p.length));
    let ids = prompts.map((p) => [...Array(long - p.length).fill(this.pad), ...p]);
    let mask = prompts.map((p, i) => [
      ...(cache?.mask[i] ?? []), ...Array(long - p.length).fill(0), ...Array(p.length).fill(1),
    ]);
    let past = cache?.past ?? Object.fromEntries(this.caches.map(({ name, type, shape }) => {
      const dims = shape.map((d, i) => (typeof d == "number" ? d : i == 0 ? batch : 0));
      return [name, new ort.Tensor(type, new Float32Array(0), dims)];
    }));
    let features = prompts.flatMap((p) => p.features ?? []);
    const answers = prompts.map(() => []);
    for (;;) {
      const length = ids[0].length;
      const { inputs_embeds } = await this.sessions.embed_tokens.run({ input_ids: int64(ids) });
      const width = inputs_embeds.dims[2];
      if (features.length > 0) {
        ids.flat().forEach((id, at) => id == this.image && inputs_embeds.data.set(features.shift(), at * width));
      }
      const positions = mask.map((row) => {
        let count = 0;
        return row.map((m) => (m ? count++ : 0)).slice(-length);
      });
      const { logits, ...presents } = await this.sessions.decoder_model_merged.run({
        inputs_embeds, attention_mask: int64(mask), position_ids: int64(positions), ...past,
      });
      past = Object.fromEntries(Object.entries(presents).map(([n, t]) => [n.replace("present", "past_key_values"), t]));
      const [, rows, words] = logits.dims;
      ids = answers.map((answer, i) => {
        const last = logits.data.subarray((i * rows + rows - 1) * words, (i * rows + rows) * words);
        const best = last.reduce((top, value, at) => (value > last[top] ? at : top), 0);
        if (answer.length < this.limit && !answer.includes(this.eos)) answer.push(best);
        return [best];
      });
      if (answers.every((a) => a.length == this.limit || a.at(-1) == this.eos)) return { answers, past, mask };
      mask = mask.map((row) => [...row, 1]);
    }
  }

  async conversation(turns) {
    const answers = [];
    let cache;
    for (const turn of turns) {
      const { ids, rows } = await this.prompt(turn, cache && [answers.at(-1).at(-1)]);
      cache = await this.generate([Object.assign(ids, { features: rows })], cache);
      answers.push(cache.answers[0]);
    }
    return answers;
  }

  async batch(rows) {
    const prompts = [];
    for (const row of rows) {
      const { ids, rows: features } = await this.prompt(row);
      prompts.push(Object.assign(ids, { features }));
    }
    return (await this.generate(prompts)).answers;
  }
}

const int64 = (rows) => new ort.Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
