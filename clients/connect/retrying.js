// What a client of the gateway needs besides Connect, which has no retries of its own and knows no
// service config.

import { Code, ConnectError } from '@connectrpc/connect';

import { ErrorInfoSchema, RetryInfoSchema } from './gen/google/rpc/error_details_pb.js';

const TRIES = 3;

// Makes a call with a deadline, and again if it is certain that nothing was created.
export async function retrying(milliseconds, call) {
  const deadline = Date.now() + milliseconds;
  let pause = 500;
  for (let tries = 1; ; tries += 1) {
    try {
      return await call(deadline - Date.now());
    } catch (thrown) {
      const error = ConnectError.from(thrown);
      const [asked] = error.findDetails(RetryInfoSchema);
      if (asked) pause = Math.max(pause, Number(asked.retryDelay.seconds) * 1000 + asked.retryDelay.nanos / 1e6);
      const again = error.code === Code.Unavailable && outcome(error) === 'NOT_APPLIED';
      if (!again || tries === TRIES || Date.now() + pause >= deadline) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause *= 2;
  }
}

// Whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an error without
// the gateway's ErrorInfo comes from the library or from somebody in between, and whatever its
// code is, it proves nothing.
export function outcome(error) {
  const [info] = error.findDetails(ErrorInfoSchema);
  return info?.domain === 'aep-batch-gateway' ? info.metadata.outcome : 'UNKNOWN';
}

// `InvalidArgument` → `INVALID_ARGUMENT`, as all gRPC libraries have it.
export function codeName(code) {
  if (code === Code.Canceled) return 'CANCELLED';
  return Code[code].replace(/(?<=[a-z])[A-Z]/g, (letter) => `_${letter}`).toUpperCase();
}
