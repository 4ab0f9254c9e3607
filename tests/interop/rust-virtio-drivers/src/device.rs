// SPDX-License-Identifier: MIT OR Apache-2.0
//! A virtio block device behind the crate's `Transport`, honest where a case does not say otherwise. It works inside
//! `notify`, so every run is the same.

use std::cell::RefCell;
use std::mem::size_of;
use std::rc::Rc;

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const FLUSH: u64 = 1 << 9;
pub const READ_ONLY: u64 = 1 << 5;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const ACCESS_PLATFORM: u64 = 1 << 33;
pub const RING_PACKED: u64 = 1 << 34;
pub const HONEST: u64 = FLUSH | VERSION_1 | ACCESS_PLATFORM | RING_PACKED;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u16 = 4;
/// What an honest device reads from its disk.
pub const DATA: u8 = 0xAB;

/// One request as the device sees it.
#[derive(Clone)]
pub struct Request {
    pub head: u16,
    /// Type and sector of its header; of no meaning where the queue is not a disk's.
    pub kind: u32,
    pub sector: u64,
    /// (address, length) of what the device may write.
    pub writable: Vec<(u64, u32)>,
    /// What an honest device says that it has written.
    pub written: u32,
    /// Of the indirect table, or 0.
    pub table: u64,
}

/// The device's side of one queue.
#[derive(Default)]
pub struct Queue {
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
    pub taken: u16,
    pub used: u16,
}

fn read<T: Copy>(address: u64) -> T {
    unsafe { (address as *const T).read_volatile() }
}

pub fn write<T>(address: u64, value: T) {
    unsafe { (address as *mut T).write_volatile(value) }
}

impl Queue {
    fn take(&mut self) -> Option<Request> {
        if read::<u16>(self.driver + 2) == self.taken {
            return None;
        }
        let head: u16 = read(self.driver + 4 + 2 * u64::from(self.taken % self.size));
        self.taken = self.taken.wrapping_add(1);
        let (mut base, mut at, mut table) = (self.descriptors, head, 0);
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        loop {
            let entry = base + 16 * u64::from(at);
            let (address, length): (u64, u32) = (read(entry), read(entry + 8));
            let (flags, next): (u16, u16) = (read(entry + 12), read(entry + 14));
            if flags & TABLE != 0 {
                (base, at, table) = (address, 0, address);
                continue;
            }
            if flags & WRITE != 0 {
                writable.push((address, length))
            } else {
                readable.push((address, length))
            }
            if flags & NEXT == 0 {
                break;
            }
            at = next;
        }
        let written = writable.iter().map(|part| part.1).sum();
        let (kind, sector) = match readable.first() {
            Some(&(address, 16)) => (read(address), read(address + 8)),
            _ => (0, 0),
        };
        Some(Request {
            head,
            kind,
            sector,
            writable,
            written,
            table,
        })
    }

    /// An element of the used ring, at the next position, without telling.
    pub fn put(&mut self, identifier: u32, length: u32) {
        let at = self.device + 4 + 8 * u64::from(self.used % self.size);
        write(at, identifier);
        write(at + 4, length);
        self.used = self.used.wrapping_add(1);
    }

    /// Tell how far the used ring goes.
    pub fn publish(&self, index: u16) {
        write(self.device + 2, index);
    }

    /// The index from which on the device wants to be kicked.
    pub fn ask_for_kick(&self, index: u16) {
        write(self.device + 4 + 8 * u64::from(self.size), index);
    }

    /// Overwrite the whole descriptor table.
    pub fn scribble(&self) {
        unsafe { (self.descriptors as *mut u8).write_bytes(0xFF, 16 * usize::from(self.size)) };
    }

    /// Complete honestly.
    pub fn push(&mut self, request: &Request) {
        self.put(request.head.into(), request.written);
        self.publish(self.used);
    }
}

/// Fill the data and set the status: what an honest disk does before it completes.
pub fn perform(request: &Request) {
    let Some((status, data)) = request.writable.split_last() else {
        return;
    };
    for &(address, length) in data {
        unsafe { (address as *mut u8).write_bytes(DATA, length as usize) };
    }
    write::<u8>(status.0, 0);
}

type Complete = Box<dyn FnMut(&mut Queue, Request)>;

/// Registers, queues and counters.
pub struct Device {
    pub features: u64,
    pub queue_entries: u32,
    /// What the status register shows on top of what was written to it, and what it never shows.
    pub status_set: DeviceStatus,
    pub status_clear: DeviceStatus,
    /// The configuration never stands still; after so many readings the program says so and ends.
    pub restless: bool,
    pub generation_reads: u64,
    pub status_reads: std::cell::Cell<u64>,
    pub accepted: u64,
    pub kicks: u64,
    pub requests: Vec<Request>,
    pub queue: Queue,
    pub complete: Complete,
    status: DeviceStatus,
}

const ENOUGH: u64 = 1_000_000;

impl Device {
    pub fn new(features: u64, complete: impl FnMut(&mut Queue, Request) + 'static) -> Bus {
        Bus(Rc::new(RefCell::new(Device {
            features,
            queue_entries: 16,
            status_set: DeviceStatus::empty(),
            status_clear: DeviceStatus::empty(),
            restless: false,
            generation_reads: 0,
            status_reads: 0.into(),
            accepted: 0,
            kicks: 0,
            requests: Vec::new(),
            queue: Queue::default(),
            complete: Box::new(complete),
            status: DeviceStatus::empty(),
        })))
    }

    fn serve(&mut self) {
        self.kicks += 1;
        while let Some(request) = self.queue.take() {
            self.requests.push(request.clone());
            (self.complete)(&mut self.queue, request);
        }
    }
}

/// The transport; cases keep a second one to look at the device.
#[derive(Clone)]
pub struct Bus(pub Rc<RefCell<Device>>);

impl Transport for Bus {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn read_device_features(&mut self) -> u64 {
        self.0.borrow().features
    }

    fn write_driver_features(&mut self, features: u64) {
        self.0.borrow_mut().accepted = features;
    }

    fn max_queue_size(&mut self, _queue: u16) -> u32 {
        self.0.borrow().queue_entries
    }

    fn notify(&mut self, _queue: u16) {
        self.0.borrow_mut().serve();
    }

    fn get_status(&self) -> DeviceStatus {
        let device = self.0.borrow();
        device.status_reads.set(device.status_reads.get() + 1);
        (device.status | device.status_set) - device.status_clear
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.0.borrow_mut().status = status;
    }

    fn set_guest_page_size(&mut self, _size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        _queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        self.0.borrow_mut().queue = Queue {
            size: size as u16,
            descriptors,
            driver,
            device,
            taken: 0,
            used: 0,
        };
    }

    fn queue_unset(&mut self, _queue: u16) {}

    fn queue_used(&mut self, _queue: u16) -> bool {
        false
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        let mut device = self.0.borrow_mut();
        device.generation_reads += 1;
        if !device.restless {
            return 0;
        }
        if device.generation_reads == ENOUGH {
            println!("still reading the generation after {ENOUGH} times");
            std::process::exit(0);
        }
        device.generation_reads as u32
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut space = [0u8; 64];
        space[..8].copy_from_slice(&2048u64.to_le_bytes());
        let field = space
            .get(offset..offset + size_of::<T>())
            .ok_or(Error::ConfigSpaceTooSmall)?;
        T::read_from_bytes(field).map_err(|_| Error::ConfigSpaceTooSmall)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _offset: usize,
        _value: T,
    ) -> Result<()> {
        Ok(())
    }
}
