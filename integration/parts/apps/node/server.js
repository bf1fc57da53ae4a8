// SPDX-License-Identifier: Apache-2.0
// An HTTP server, with a client in a process of its own. The server appends
// what the client sends to a file, and answers with the digest of all of it. A
// thread of the server looks after objects, which it changes and checks.
'use strict';
const { fork } = require('node:child_process');
const { createHash } = require('node:crypto');
const fs = require('node:fs/promises');
const http = require('node:http');
const { Worker } = require('node:worker_threads');

const path = '/var/lib/app/log';

function fail(why) {
  console.log('failed: server:', why);
  process.exit(1);
}
process.on('uncaughtException', fail);
process.on('unhandledRejection', fail);

function next(digest, entry) {
  return createHash('sha256').update(digest).update(entry).digest('hex');
}

async function main() {
  const log = await fs.open(path, 'w');
  let digest = '';
  let waiting = [];

  const answers = {
    '/append': async (request, answer) => {
      let entry = '';
      for await (const part of request) entry += part;
      await log.write(entry + '\n');
      await log.datasync();
      digest = next(digest, entry);
      answer.end(digest);
    },
    '/wait': async (request, answer) => { waiting.push(answer); },
    '/signal': async (request, answer) => {
      let text = '';
      for await (const part of request) text += part;
      for (const w of waiting) w.end(text);
      answer.end(`sent to ${waiting.length}\n`);
      waiting = [];
    },
    // An answer that does not end, a number every 50 ms.
    '/ticks': async (request, answer) => {
      let n = 0;
      const timer = setInterval(() => answer.write(`${++n}\n`), 50);
      answer.on('close', () => clearInterval(timer));
    },
  };
  const server = http.createServer((request, answer) => answers[request.url](request, answer).catch(fail));
  // The clock runs on during a checkpoint and a restore, and a timeout may have
  // expired then.
  server.keepAliveTimeout = 0;
  server.headersTimeout = 0;
  server.requestTimeout = 0;
  await new Promise((done) => server.listen(8080, '127.0.0.1', done));

  const objects = new Worker('/app/objects.js');
  objects.on('error', fail);
  const client = fork('/app/client.js');
  client.on('exit', (status, signal) => fail(`the client has ended with ${status ?? signal}`));

  process.on('SIGTERM', async () => {
    client.removeAllListeners('exit');
    client.disconnect();
    await new Promise((done) => client.on('exit', done));
    server.closeAllConnections();
    await new Promise((done) => server.close(done));
    objects.postMessage('stop');
    await new Promise((done) => objects.on('exit', done));
    await log.close();
    let have = '';
    const file = await fs.open(path);
    for await (const line of file.readLines()) have = next(have, line);
    if (have !== digest) fail(`the file has the digest ${have}, not ${digest}`);
    console.log('stopped');
    process.exit(0);
  });
}
main().catch(fail);
