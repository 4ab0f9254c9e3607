// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory between the driver and its device, as a confidential VM has it: what is lent is copied to zeroed shared
//! memory and back. Everything that is wrong with a return is counted instead of ending the program.

use std::alloc::{Layout, alloc_zeroed};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// What is lent to the device now, by address, with its length; and what came back without having been lent.
#[derive(Default)]
pub struct Ledger {
    pub lent: HashMap<PhysAddr, usize>,
    pub strange: Vec<PhysAddr>,
}

static LEDGER: Mutex<Option<Ledger>> = Mutex::new(None);

/// Lend the driver's own memory, without a copy: a machine without confidential memory.
pub static IN_PLACE: AtomicBool = AtomicBool::new(false);

/// Look at the ledger.
pub fn ledger<T>(look: impl FnOnce(&mut Ledger) -> T) -> T {
    let mut guard = LEDGER
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    look(guard.get_or_insert_with(Ledger::default))
}

/// Zeroed pages that are never given back: a case is one short process.
fn pages(count: usize) -> NonNull<u8> {
    let layout = Layout::from_size_align(count.max(1) * PAGE_SIZE, PAGE_SIZE).unwrap();
    NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap()
}

/// The pages of this process; addresses are its own.
pub struct Memory;

unsafe impl Hal for Memory {
    fn dma_alloc(count: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let start = pages(count);
        (start.as_ptr() as PhysAddr, start)
    }

    unsafe fn dma_dealloc(_address: PhysAddr, _start: NonNull<u8>, _count: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).unwrap()
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let own = buffer.as_ptr() as *mut u8;
        let shared = if IN_PLACE.load(Ordering::Relaxed) {
            own
        } else {
            let fresh = pages(buffer.len().div_ceil(PAGE_SIZE)).as_ptr();
            if direction != BufferDirection::DeviceToDriver {
                unsafe { fresh.copy_from_nonoverlapping(own, buffer.len()) };
            }
            fresh
        };
        ledger(|ledger| ledger.lent.insert(shared as PhysAddr, buffer.len()));
        shared as PhysAddr
    }

    unsafe fn unshare(address: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let lent = ledger(|ledger| {
            let found = ledger.lent.remove(&address);
            if found.is_none() {
                ledger.strange.push(address);
            }
            found
        });
        let copied =
            !IN_PLACE.load(Ordering::Relaxed) && direction != BufferDirection::DriverToDevice;
        if lent == Some(buffer.len()) && copied {
            let own = buffer.as_ptr() as *mut u8;
            unsafe { own.copy_from_nonoverlapping(address as *const u8, buffer.len()) };
        }
    }
}
