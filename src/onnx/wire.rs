//! Protobuf's wire format, one level at a time.
//!
//! The reader walks the outer messages itself, so that every element is known
//! as the slice it was read from: what no pass touched is written back as these
//! very bytes, fields that this version does not know included. Generated types
//! (which would drop them) decode only the leaves.

use bytes::Bytes;

/// A malformed message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset} of the message: {problem}")]
pub(crate) struct WireError {
    /// Offset in the message that was being walked.
    pub(crate) offset: usize,
    /// What was found.
    pub(crate) problem: &'static str,
}

/// Contents of a field.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    /// Wire type 0.
    Varint(u64),
    /// Wire types 1 and 5: not looked into.
    Fixed,
    /// Wire type 2.
    Bytes(Bytes),
}

/// One field of a message.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    /// Number.
    pub(crate) number: u32,
    /// Contents.
    pub(crate) payload: Payload,
    /// Tag, length and contents as they stand in the file.
    pub(crate) whole: Bytes,
}

impl Field {
    /// The contents of a length-delimited field.
    pub(crate) fn bytes(&self) -> Result<&Bytes, WireError> {
        match &self.payload {
            Payload::Bytes(bytes) => Ok(bytes),
            _ => Err(WireError {
                offset: 0,
                problem: "expected a length-delimited field",
            }),
        }
    }

    /// The contents as UTF-8 text.
    pub(crate) fn text(&self) -> Result<String, WireError> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| WireError {
            offset: 0,
            problem: "expected UTF-8 text",
        })
    }
}

/// The fields of a message, in order.
pub(crate) fn fields(message: &Bytes) -> Fields {
    Fields {
        message: message.clone(),
        at: 0,
    }
}

/// Iterator of [`fields`].
pub(crate) struct Fields {
    message: Bytes,
    at: usize,
}

impl Fields {
    fn varint(&mut self) -> Result<u64, &'static str> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = *self
                .message
                .get(self.at)
                .ok_or("the message ends inside a number")?;
            self.at += 1;
            if shift == 63 && byte > 1 {
                return Err("a number longer than 64 bits");
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number longer than 10 bytes")
    }

    fn skip(&mut self, count: u64) -> Result<Bytes, &'static str> {
        let left = (self.message.len() - self.at) as u64;
        if count > left {
            return Err("a field is longer than the message that holds it (truncated file?)");
        }
        let start = self.at;
        // Fits: not more than what is left of a slice.
        self.at += count as usize;
        Ok(self.message.slice(start..self.at))
    }

    fn field(&mut self) -> Result<Field, &'static str> {
        let start = self.at;
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| "a field number out of range")?;
        if number == 0 {
            return Err("field number 0 (not a protobuf file?)");
        }
        let payload = match tag & 7 {
            0 => Payload::Varint(self.varint()?),
            1 => self.skip(8).map(|_| Payload::Fixed)?,
            2 => {
                let length = self.varint()?;
                Payload::Bytes(self.skip(length)?)
            }
            5 => self.skip(4).map(|_| Payload::Fixed)?,
            _ => return Err("an unknown wire type (not a protobuf file?)"),
        };
        Ok(Field {
            number,
            payload,
            whole: self.message.slice(start..self.at),
        })
    }
}

impl Iterator for Fields {
    type Item = Result<Field, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.message.len() {
            return None;
        }
        let start = self.at;
        let field = self.field().map_err(|problem| WireError {
            offset: start,
            problem,
        });
        if field.is_err() {
            self.at = self.message.len();
        }
        Some(field)
    }
}

/// A message under construction: pieces that are not copied together.
#[derive(Debug, Default)]
pub(crate) struct Rope {
    parts: Vec<Bytes>,
    length: u64,
}

impl Rope {
    /// Appends a complete field.
    pub(crate) fn whole(&mut self, field: Bytes) {
        self.length += field.len() as u64;
        self.parts.push(field);
    }

    /// Appends a length-delimited field.
    pub(crate) fn bytes(&mut self, number: u32, contents: Bytes) {
        self.header(number, contents.len() as u64);
        self.whole(contents);
    }

    /// Appends a text field.
    pub(crate) fn text(&mut self, number: u32, contents: &str) {
        self.bytes(number, Bytes::copy_from_slice(contents.as_bytes()));
    }

    /// Appends a message as a field.
    pub(crate) fn message(&mut self, number: u32, contents: Rope) {
        self.header(number, contents.length);
        self.length += contents.length;
        self.parts.extend(contents.parts);
    }

    /// Appends a generated message as a field.
    pub(crate) fn encode(&mut self, number: u32, message: &impl prost::Message) {
        self.bytes(number, message.encode_to_vec().into());
    }

    fn header(&mut self, number: u32, length: u64) {
        let mut head = Vec::with_capacity(12);
        varint(u64::from(number) << 3 | 2, &mut head);
        varint(length, &mut head);
        self.whole(head.into());
    }

    /// Total length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// The pieces in order.
    pub(crate) fn parts(&self) -> &[Bytes] {
        &self.parts
    }
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rope_reads_back_as_its_fields() {
        let mut inner = Rope::default();
        inner.text(3, "x");
        let mut rope = Rope::default();
        rope.text(1, &"a".repeat(300));
        rope.message(7, inner);
        let flat: Vec<u8> = rope.parts().concat();
        assert_eq!(rope.len(), flat.len() as u64);
        let read: Vec<Field> = fields(&flat.into()).collect::<Result<_, _>>().unwrap();
        assert_eq!(read[0].text().unwrap().len(), 300);
        let nested: Vec<Field> = fields(read[1].bytes().unwrap())
            .map(Result::unwrap)
            .collect();
        assert_eq!((read[1].number, nested[0].number), (7, 3));
    }

    #[test]
    fn malformed_messages_are_errors() {
        let cases: [&[u8]; 5] = [
            &[0x0a, 0x05, 1],    // length beyond the end
            &[0x0a],             // no length
            &[0x08, 0xff, 0xff], // unfinished varint
            &[0x0b],             // group
            &[0x00, 0x01],       // field 0
        ];
        for case in cases {
            let result: Result<Vec<_>, _> = fields(&Bytes::copy_from_slice(case)).collect();
            assert!(result.is_err(), "{case:?}");
        }
        let long = [&[0x08][..], &[0xff; 10]].concat();
        assert!(fields(&long.into()).next().unwrap().is_err());
    }
}
