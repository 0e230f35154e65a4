// Runs client modules in Node.js: node node.mjs JOBS.json, a list of answers on stdout.

import { readFileSync } from "node:fs";
import { dirname, basename } from "node:path";

const results = [];
for (const { client, job } of JSON.parse(readFileSync(process.argv[2], "utf8"))) {
  const module = await import(`./${client}.mjs`);
  const folder = dirname(job.model) + "/";
  const answers = await module.run({ ...job, model: basename(job.model) }, folder);
  results.push({ version: await module.version(), answers });
}
process.stdout.write(JSON.stringify(results) + "\n");
