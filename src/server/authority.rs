//! The `:authority` of calls over a Unix socket.
//!
//! A Unix socket has no host name, so gRPC's C core (C++, Python, Ruby, PHP, C#) and grpc-java
//! send the socket's path: `tmp%2Fgw.sock`, `/tmp/gw.sock`. That is not a valid authority of a
//! URI, and h2 resets such a stream with PROTOCOL_ERROR (hyperium/h2#442). So this overwrites
//! invalid characters before h2 sees them. Lengths do not change, neither encoded nor decoded,
//! so the dynamic table of HPACK (RFC 7541) stays in sync with the client's.
//!
//! Requests that h2 refuses anyway are logged: see [`ProtocolErrors`].

use std::ops::Range;

/// The client preface (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const RST_STREAM: u8 = 3;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Finds frame boundaries (RFC 9113, section 4.1), however the bytes are split into reads.
#[derive(Debug, Default)]
struct Frames {
    head: [u8; 9],
    have: usize,
    /// How much of the payload was seen.
    passed: usize,
}

impl Frames {
    fn kind(&self) -> u8 {
        self.head[3]
    }

    fn has(&self, flag: u8) -> bool {
        self.head[4] & flag != 0
    }

    fn length(&self) -> usize {
        let [a, b, c, ..] = self.head;
        u32::from_be_bytes([0, a, b, c]) as usize
    }

    /// The next piece of a payload in `bytes` from `at` on, and its offset in the payload.
    fn next(&mut self, bytes: &[u8], at: &mut usize) -> Option<(Range<usize>, usize)> {
        loop {
            if self.have == self.head.len() && self.passed == self.length() {
                (self.have, self.passed) = (0, 0);
            }
            if *at == bytes.len() {
                return None;
            }
            if self.have < self.head.len() {
                self.head[self.have] = bytes[*at];
                self.have += 1;
                *at += 1;
                continue;
            }
            let (begin, offset) = (*at, self.passed);
            let piece = (self.length() - offset).min(bytes.len() - begin);
            self.passed += piece;
            *at += piece;
            return Some((begin..*at, offset));
        }
    }
}

/// Finds streams that h2 resets with PROTOCOL_ERROR. It does so for malformed requests, and
/// reports them to nobody but the client.
#[derive(Debug, Default)]
pub(super) struct ProtocolErrors {
    frames: Frames,
    code: u32,
}

impl ProtocolErrors {
    /// Whether these bytes, the next ones sent, contain such a reset.
    pub(super) fn found_in(&mut self, bytes: &[u8]) -> bool {
        const PROTOCOL_ERROR: u32 = 1;
        let (mut at, mut found) = (0, false);
        while let Some((piece, _)) = self.frames.next(bytes, &mut at) {
            if self.frames.kind() == RST_STREAM {
                for byte in &bytes[piece] {
                    self.code = self.code << 8 | u32::from(*byte);
                }
                let ends = self.frames.passed == self.frames.length();
                found |= ends && self.code == PROTOCOL_ERROR;
            }
        }
        found
    }
}

/// Rewrites the `:authority` of each call so that h2 accepts it.
#[derive(Debug)]
pub(super) struct Authorities {
    /// The rest of the preface. `None` if the connection began with something else, so it is
    /// not HTTP/2.
    preface: Option<&'static [u8]>,
    frames: Frames,
    padding: usize,
    field: Field,
}

/// The part of a header field (RFC 7541, section 6) that the next byte belongs to.
#[derive(Clone, Copy, Debug)]
enum Field {
    Begin,
    /// An integer: its value so far, the shift of the next 7 bits, its meaning.
    Integer(u64, u32, Integer),
    Length(Text),
    Text(Text),
    /// Invalid encoding: h2 ends the connection.
    Invalid,
}

/// What an integer means.
#[derive(Clone, Copy, Debug)]
enum Integer {
    /// The whole field.
    Field,
    /// The index of a field's name.
    Name,
    /// The length of a text.
    Length(Text),
}

/// The name or the value of a field.
#[derive(Clone, Copy, Debug, Default)]
struct Text {
    is_name: bool,
    /// A name: equals `:authority` so far. A value: belongs to `:authority`.
    is_authority: bool,
    is_huffman: bool,
    length: u64,
    at: u64,
    /// The bits of an incomplete Huffman code, and their number.
    code: (u32, u32),
}

impl Default for Authorities {
    fn default() -> Self {
        Authorities {
            preface: Some(PREFACE),
            frames: Frames::default(),
            padding: 0,
            field: Field::Begin,
        }
    }
}

impl Authorities {
    /// Rewrites the next received bytes in place.
    pub(super) fn rewrite(&mut self, bytes: &mut [u8]) {
        let Some(preface) = self.preface else { return };
        let mut at = preface.len().min(bytes.len());
        self.preface = preface.strip_prefix(&bytes[..at]);
        if self.preface.is_none() {
            return;
        }
        while let Some((piece, offset)) = self.frames.next(bytes, &mut at) {
            if matches!(self.frames.kind(), HEADERS | CONTINUATION) {
                self.rewrite_block(&mut bytes[piece], offset);
            }
        }
    }

    /// A piece of the payload of HEADERS or CONTINUATION.
    fn rewrite_block(&mut self, bytes: &mut [u8], offset: usize) {
        let frames = &self.frames;
        let is_headers = frames.kind() == HEADERS;
        let is_padded = is_headers && frames.has(PADDED);
        let has_priority = is_headers && frames.has(PRIORITY);
        let begin = usize::from(is_padded) + 5 * usize::from(has_priority);
        let length = frames.length();
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = offset + i;
            if at == 0 {
                self.padding = if is_padded { (*byte).into() } else { 0 };
                if is_headers {
                    self.field = Field::Begin;
                }
            }
            if at >= begin && at + self.padding < length {
                self.field = self.field.pass(byte);
            }
        }
    }
}

impl Field {
    fn pass(self, byte: &mut u8) -> Self {
        match self {
            Field::Begin => match *byte {
                0x80.. => Field::integer(*byte, 7, Integer::Field),
                0x40.. => Field::integer(*byte, 6, Integer::Name),
                0x20.. => Field::integer(*byte, 5, Integer::Field),
                _ => Field::integer(*byte, 4, Integer::Name),
            },
            Field::Length(mut text) => {
                text.is_huffman = *byte & 0x80 != 0;
                Field::integer(*byte, 7, Integer::Length(text))
            }
            Field::Integer(_, 28.., _) | Field::Invalid => Field::Invalid,
            Field::Integer(value, shift, says) => {
                let value = value + (u64::from(*byte & 0x7f) << shift);
                match *byte & 0x80 {
                    0 => Field::after(value, says),
                    _ => Field::Integer(value, shift + 7, says),
                }
            }
            Field::Text(text) => text.pass(byte),
        }
    }

    /// An integer whose first `bits` bits are in `byte` (RFC 7541, section 5.1).
    fn integer(byte: u8, bits: u32, says: Integer) -> Self {
        let all = (1 << bits) - 1;
        match u64::from(byte & all) {
            value if value == u64::from(all) => Field::Integer(value, 0, says),
            value => Field::after(value, says),
        }
    }

    fn after(value: u64, says: Integer) -> Self {
        const AUTHORITY: u64 = 1; // in the static table
        match says {
            Integer::Field => Field::Begin,
            Integer::Name => Field::Length(Text {
                is_name: value == 0,
                is_authority: value == 0 || value == AUTHORITY,
                ..Text::default()
            }),
            Integer::Length(text) => Text {
                length: value,
                ..text
            }
            .next_field(),
        }
    }
}

impl Text {
    fn next_field(self) -> Field {
        const NAMES: [u64; 2] = [PLAIN.len() as u64, HUFFMAN.len() as u64];
        match self.at < self.length {
            true => Field::Text(self),
            false if self.is_name => Field::Length(Text {
                is_authority: self.is_authority
                    && self.length == NAMES[usize::from(self.is_huffman)],
                ..Text::default()
            }),
            false => Field::Begin,
        }
    }

    fn pass(mut self, byte: &mut u8) -> Field {
        if self.is_name {
            let name: &[u8] = if self.is_huffman { HUFFMAN } else { PLAIN };
            let expected = usize::try_from(self.at).ok().and_then(|at| name.get(at));
            self.is_authority &= expected == Some(byte);
        } else if self.is_authority && self.is_huffman {
            self.rewrite_huffman(byte);
        } else if self.is_authority && !is_host(*byte) {
            *byte = b'-';
        }
        self.at += 1;
        self.next_field()
    }

    /// Decodes the codes (RFC 7541, appendix B), and replaces those of a space, `%` and `/` by
    /// valid ones of the same length. Flipping the last bit of the code is enough.
    fn rewrite_huffman(&mut self, byte: &mut u8) {
        for bit in (0..8).rev() {
            let (code, bits) = &mut self.code;
            *code = *code << 1 | u32::from(*byte >> bit & 1);
            *bits += 1;
            let flips = match (*bits, *code) {
                (5, 0b01010) => true,  // a space or `%`: becomes `-` or `.`
                (6, 0b011000) => true, // `/`: becomes `3`
                _ => false,
            };
            if flips {
                *byte ^= 1 << bit;
                *code ^= 1;
            }
            // Codes of one length are consecutive, and longer codes are greater.
            let is_complete = match *bits {
                5 => *code < 0xa,
                6 => *code < 0x2e,
                7 => *code < 0x7c,
                8 => *code < 0xfe,
                ..5 => false,
                _ => {
                    self.is_authority = false; // h2 refuses this character
                    false
                }
            };
            if is_complete {
                self.code = (0, 0);
            }
        }
    }
}

const PLAIN: &[u8] = b":authority";
const HUFFMAN: &[u8] = b"\xb8\x3b\x53\x39\xec\x32\x7d\x7f";

fn is_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<_> = text.split_whitespace().collect();
        let digits = digits.concat();
        let pairs = (0..digits.len()).step_by(2);
        pairs
            .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
            .collect()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags, 0, 0, 0, 1]].concat();
        [&head, payload].concat()
    }

    /// In pieces of every size.
    fn mended(sent: &[u8]) -> Vec<u8> {
        let all: Vec<_> = (1..=sent.len())
            .map(|size| {
                let mut authorities = Authorities::default();
                let mut sent = sent.to_vec();
                sent.chunks_mut(size)
                    .for_each(|piece| authorities.rewrite(piece));
                sent
            })
            .collect();
        assert!(all.iter().all(|one| *one == all[0]));
        all[0].clone()
    }

    #[test]
    fn an_authority_becomes_one_in_every_coding() {
        let plain = |name: &str, text: &str| [&hex(name), text.as_bytes()].concat();
        let (name, path) = ("40 0a 3a617574686f72697479 10", "tmp%2Fsrvgw.sock");
        for (field, expected) in [
            // gRPC's C core.
            (plain(name, path), plain(name, "tmp-2Fsrvgw.sock")),
            (
                plain("41 0c", "/tmp/gw.sock"),
                plain("41 0c", "-tmp-gw.sock"),
            ),
            (plain("01 03", "a|b"), plain("01 03", "a-b")),
            (plain("11 09", "localhost"), plain("11 09", "localhost")),
            // Huffman: `/tmp/gw.sock` becomes `3tmp3gw.sock`, and `%2Ftmp%2Fgw.sock`
            // `.2Ftmp.2Fgw.sock`.
            (
                hex("41 89 6134d6c4de1741c9d7"),
                hex("41 89 6534d6ccde1741c9d7"),
            ),
            (
                hex("00 88 b83b5339ec327d7f 8c 5458534d6a8b0cde1741c9d7"),
                hex("00 88 b83b5339ec327d7f 8c 5c58534d6b8b0cde1741c9d7"),
            ),
            // Another field.
            (plain("44 04", "/a%b"), plain("44 04", "/a%b")),
            (plain("40 01 61 03", "/%|"), plain("40 01 61 03", "/%|")),
            // The table's size, a field from the table, an integer of three bytes.
            (hex("3f e1 1f 82 41 01 2f"), hex("3f e1 1f 82 41 01 2d")),
        ] {
            let (head, tail) = field.split_at(field.len() / 2);
            let padded = |block: &[u8]| [&[3], &[0; 5][..], block, &[47; 3]].concat();
            let with = |field: &[u8], head: &[u8], tail: &[u8]| {
                let mut sent = PREFACE.to_vec();
                sent.extend(frame(4, 0, b"/tmp/x")); // SETTINGS
                sent.extend(frame(HEADERS, 4, field));
                sent.extend(frame(0, 0, field)); // DATA
                sent.extend(frame(HEADERS, PADDED | PRIORITY, &padded(head)));
                sent.extend(frame(CONTINUATION, 4, tail));
                sent
            };
            let sent = with(&field, head, tail);
            let mended = mended(&sent);
            let (head, tail) = expected.split_at(expected.len() / 2);
            let mut expected_all = with(&expected, head, tail);
            let data = PREFACE.len() + 15 + 9 + field.len() + 9;
            expected_all[data..data + field.len()].copy_from_slice(&field);
            assert_eq!(mended, expected_all, "{field:x?}");
        }
    }

    #[test]
    fn other_protocols_are_not_changed() {
        let sent = [
            b"POST /abc".as_slice(),
            &frame(HEADERS, 4, b"\x41\x01/"),
            &[1; 99],
        ]
        .concat();
        assert_eq!(mended(&sent), sent);
    }

    #[test]
    fn no_input_makes_it_panic() {
        let mut bytes = vec![0; 2000];
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            random.fill(&mut bytes);
            let mut authorities = Authorities::default();
            authorities.rewrite(&mut PREFACE.to_vec());
            authorities.rewrite(&mut frame(HEADERS, 4, &bytes));
            authorities.rewrite(&mut bytes);
        }
    }

    #[test]
    fn a_reset_is_found_in_pieces_of_every_size() {
        let reset = |code: u8| frame(RST_STREAM, 0, &[0, 0, 0, code]);
        let sent = [frame(0, 0, &[3; 20]), reset(8), frame(4, 1, &[])].concat();
        for (last, expected) in [(reset(1), 1), (reset(2), 0)] {
            let sent = [&sent[..], &last, &sent].concat();
            for size in 1..=sent.len() {
                let mut resets = ProtocolErrors::default();
                let found = sent.chunks(size).filter(|piece| resets.found_in(piece));
                assert_eq!(found.count(), expected);
            }
        }
    }
}
