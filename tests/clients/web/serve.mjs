// Serves the test page, the models and the npm packages to a headless Chromium on this machine, and prints what the
// page answers: node serve.mjs JOBS.json CHROMIUM, a JSON list on stdout.
//
// JOBS.json is a list of {client, job}; models and pictures are given by their paths, and served from there.

import { spawn } from "node:child_process";
import { createReadStream, mkdtempSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { basename, dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const [, , file, chromium] = process.argv;
const here = dirname(fileURLToPath(import.meta.url));
const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm",
  ".json": "application/json", ".png": "image/png" };
const MINUTES = 8;

// Every folder that a job names is served under its own name.
const folders = { "/modules": join(here, "../node_modules"), "/clients": join(here, "../clients") };
const jobs = JSON.parse(readFileSync(file, "utf8"));
const served = (path) => `/pictures/${basename(path)}`;
for (const { job } of jobs) {
  folders[`/models/${basename(job.model)}`] = job.model;
  job.model = basename(job.model);
  for (const turn of job.cases.flatMap((c) => c.turns ?? c.rows)) {
    for (const picture of turn.images) folders[served(picture)] = picture;
    turn.images = turn.images.map(served);
  }
}

function path(url) {
  if (url == "/") return join(here, "page.html");
  const clean = normalize(decodeURIComponent(url));
  const mount = Object.keys(folders).find((m) => clean == m || clean.startsWith(m + "/"));
  return mount && join(folders[mount], clean.slice(mount.length));
}

const answers = [];
let browser;
// Beside the copy of this script that the tests make, and removed with it.
const profile = mkdtempSync(join(here, "profile-"));
let finished = false;
function end(code, problem) {
  if (finished) return;
  finished = true;
  if (problem) process.stderr.write(problem + "\n");
  browser?.kill();
  process.stdout.write(JSON.stringify(answers) + "\n", () => process.exit(code));
}

const server = createServer((request, response) => {
  const url = new URL(request.url, "http://localhost").pathname;
  if (request.method == "POST") {
    let body = "";
    request.on("data", (part) => (body += part));
    request.on("end", () => {
      response.end();
      if (url == "/answers") answers.push(JSON.parse(body));
      if (url == "/end") end(0);
    });
    return;
  }
  if (url == "/jobs") return response.end(JSON.stringify(jobs));
  const found = path(url);
  try {
    const { size } = statSync(found);
    response.writeHead(200, { "content-type": TYPES[extname(found)] ?? "application/octet-stream", "content-length": size });
    if (request.method == "HEAD") return response.end();
    createReadStream(found).pipe(response);
  } catch {
    response.writeHead(404).end();
  }
});
server.listen(0, "127.0.0.1", () => {
  const address = `http://127.0.0.1:${server.address().port}/`;
  const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", `--user-data-dir=${profile}`];
  browser = spawn(chromium, [...flags, address], { stdio: "ignore" });
  browser.on("error", (error) => end(1, `${chromium}: ${error.message}`));
  browser.on("exit", (code) => end(1, `${chromium} ended with ${code} before the page was done`));
  setTimeout(() => end(1, `the page was not done after ${MINUTES} minutes`), MINUTES * 60_000).unref();
});
